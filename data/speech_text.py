"""Sentences to speak: templates over word lists, with names, places, times, numbers and spelled strings.

A sentence has two forms: what is written in the transcript and what the synthesiser is given. They differ for letters
alone ("spelled b a t" is spoken from "B A T", or a lone "a" becomes the article). Numbers are spelled out in both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

FIRST = """alice amber andrew anna arthur ben bella carl carmen cathy chloe clara colin daisy daniel david diana dora
edith edgar elena eli emma eric esther ethan felix fiona frank gavin george gloria grace greg hannah harold harry hazel
heidi henry hugo ian ida irene isaac ivy jack james jasmine jenny joel john julia karen keith kevin laura leo lewis
lily linda lucas lucy marcus maria martin max megan mia molly nadia nathan nina noah nora oliver olivia oscar pamela
patrick paul peter phoebe rachel ralph rebecca robert rosa ruby ruth sally samuel sarah simon sophie stella steven susan
thomas tina victor violet walter wendy william yvonne zoe""".split()
LAST = """abbott baker barker bennett bishop bradley brooks burton carter chapman coleman cooper crawford dawson dixon
douglas elliott farmer fisher fletcher foster franklin gardner gibson gilbert gordon graham griffin hamilton harper
hawkins hudson hunter jenkins johnson keller kennedy lambert lawson logan marshall mason mercer miller morgan murphy
nelson newton norris palmer parker pearson porter preston quinn ramsey reynolds robinson russell sanders shelton simpson
spencer stewart sutton taylor thornton tucker turner wallace watson webster wilson winters wright young""".split()
PLACES = """athens austin berlin boston bristol brussels cairo calgary cambridge chester chicago copenhagen dallas denver
dover dublin florence geneva glasgow hamburg helsinki houston kingston lisbon liverpool london madrid manchester
melbourne memphis milan montreal moscow munich naples oslo ottawa oxford paris phoenix portland prague quebec richmond
rome salisbury seattle stockholm sydney tokyo toronto venice vienna warsaw winchester zurich""".split()
THINGS = """anchor apron arrow axe backpack balloon basket battery bell bicycle blanket boat book bottle bowl box bracelet
bridge broom brush bucket button camera candle carpet chair chimney clock coat coin compass cup curtain cushion desk
diary door dress drum envelope fence flag flute fork fountain gate glass glove guitar hammer hat helmet jacket jar kettle
key kite knife ladder lamp lantern letter machine map mirror napkin necklace needle notebook oven package painting
parcel pencil photograph piano pillow pipe plate pocket poster pot purse puzzle radio ribbon ring rope ruler saddle scarf
shelf shoe shovel spoon stamp statue stool suitcase table telescope tent ticket towel toy tractor tray trumpet umbrella
vase violin wagon wallet watch wheel whistle window""".split()
ANIMALS = """badger bear beaver bee camel cat cow crow deer dog dolphin donkey duck eagle elephant falcon fox frog giraffe
goat goose hamster hedgehog horse kitten lion lizard monkey mouse otter owl panda parrot penguin pigeon pony puppy rabbit
raven robin seal sheep snail sparrow spider squirrel swan tiger turtle whale wolf zebra""".split()
FOODS = """apples bacon bananas beans biscuits bread butter cabbage carrots cheese cherries chicken chocolate coffee
cookies cream dumplings eggs fish flour garlic ginger grapes honey jam lemons lettuce melons milk mushrooms mustard
noodles olives onions oranges pancakes pasta peaches peanuts pears pepper pickles pizza plums potatoes pudding pumpkin
rice salad salmon salt sandwiches sausages soup spinach strawberries sugar tea tomatoes vegetables vinegar walnuts""".split()
ADJECTIVES = """ancient angry beautiful blue bright broken brown cheap clean clever cold crooked curious dark delicate dirty
dusty empty expensive famous fancy favourite flat fragile fresh friendly gentle giant golden green grey happy heavy hidden
hollow huge hungry innocent large lazy little lonely loud lovely lucky magic modern muddy narrow new noisy odd old orange
ordinary pale patient perfect pink plain polite precious proud purple quick quiet rare red rough round rusty secret sharp
shiny silent silver simple sleepy slow small smooth soft special square strange strong sturdy tall thin tiny tired warm
weak white wide wild wise wonderful wooden yellow""".split()
PAST = """admired asked borrowed bought brought carried chose cleaned collected copied counted delivered described designed
discovered dropped examined fixed followed forgot found gave hid ignored kept lifted liked lost loved measured mentioned
moved noticed offered opened ordered packed painted picked pulled pushed received recognised remembered repaired returned
saved sold sent shared showed sketched stole studied threw touched traded wanted washed wrapped""".split()
JOBS = """actor artist baker banker barber builder butcher captain carpenter chef clerk dancer dentist doctor driver editor
engineer farmer firefighter gardener guide inspector janitor judge lawyer librarian magician manager mayor mechanic
merchant musician nurse officer pianist pilot plumber poet postman professor sailor scientist secretary shepherd singer
soldier student surgeon tailor teacher waiter writer""".split()
ROOMS = """airport attic bakery balcony bank barn basement beach bedroom cabin castle cave cellar church cinema classroom
college corridor cottage courtyard factory farm field forest gallery garage garden hall harbour hospital hotel island
kitchen laboratory lake library market meadow mountain museum office orchard palace park playground pond prison restaurant
river school shop stadium station street studio temple theatre tower tunnel valley village warehouse workshop""".split()
ADVERBS = """again already always carefully certainly eagerly early easily finally gently gladly hardly honestly later
never often perhaps probably quickly quietly rarely recently safely seldom silently slowly sometimes soon suddenly
today together tomorrow usually yesterday""".split()
WEATHER = (
    "breezy chilly cloudy dry foggy freezing hot humid icy misty rainy snowy stormy sunny wet windy".split()
)
MONTHS = "january february march april may june july august september october november december".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
UNITS = "metres miles pounds dollars minutes hours days weeks years people pages steps boxes degrees points".split()
CODE_WORDS = """alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec
romeo sierra tango uniform victor whiskey yankee zulu""".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += "seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth
fifteenth sixteenth seventeenth eighteenth nineteenth twentieth""".split()

# {name} draws from the list or maker of that name; '<' and '>' enclose letters that are spoken one by one.
TEMPLATES = """
{first} {past} the {adjective} {thing} in the {room}
{first} and {first} {past} a {adjective} {thing}
the {job} {past} {number} {food} from the {room}
the {adjective} {animal} {past} the {thing}
my {adjective} {animal} sleeps behind the {thing}
{adverb} the {job} {past} the {thing}
did {first} {adverb} eat the {food}
where is the {adjective} {thing}
please bring me {food} and {food}
we need more {food} for {day}
i have never seen such a {adjective} {animal}
there are {number} {animal} pictures in the {room}
the {room} near {place} is {adjective} and {adjective}
{first} {last} lives in {place}
{first} {last} works as a {job} in {place}
call {first} {last} on {digits}
my number is {digits}
the train to {place} leaves at {time}
the next bus from {place} to {place} arrives at {time}
we fly to {place} on the {ordinal} of {month}
the meeting with {last} moved to {day} at {time}
it was {weather} and {weather} in {place} on {day}
the price is {number} {unit}
{place} is {number} {unit} away from {place}
it takes {number} {unit} to reach the {room}
the answer is {number}
{number} plus {number} is {number}
{last} is spelled <{spelled_last}>
my name is {first} spelled <{spelled_first}>
the code is <{letters}> {digits}
please spell <{letters}>
the password is {code} {code} {code}
flight <{two}> {number} to {place} is {adverb} late
section <{one}> page {number}
room {number} is next to the {room}
turn left at the {room} and right at the {room}
why is the {job} so {adjective} today
can you hear the {animal} and the {animal}
{adverb} {last} and the {job} walked to the {room}
the {thing} and the {thing} belong to {first}
take the {ordinal} {thing} on the left
her {ordinal} {thing} was {adjective}
no {job} has {adverb} {past} a {thing}
{day} the {ordinal} of {month}
they {past} {food} with {food} at {time}
who {past} the {thing} of the {job}
is the {animal} {adjective} or {adjective}
""".strip().splitlines()


def number_words(n: int) -> str:
    """A whole number below one million in words, American style: 1042 -> "one thousand forty two"."""
    if not 0 <= n < 1_000_000:
        raise ValueError(f"number_words is defined for 0 .. 999999, got {n}")
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f" {ONES[n % 10]}" if n % 10 else "")
    for size, word in ((1000, "thousand"), (100, "hundred")):
        if n >= size:
            rest = n % size
            return f"{number_words(n // size)} {word}" + (f" {number_words(rest)}" if rest else "")
    raise AssertionError("unreachable")


def _number(rng: random.Random) -> str:
    digits = rng.choice((1, 2, 2, 2, 3, 3, 4))
    return number_words(rng.randrange(10 ** (digits - 1), 10**digits))


def _time(rng: random.Random) -> str:
    hour = number_words(rng.randrange(1, 13))
    form = rng.randrange(4)
    if form == 0:
        return f"{hour} o'clock"
    if form == 1:
        return f"half past {hour}"
    if form == 2:
        return f"{rng.choice(('quarter past', 'quarter to'))} {hour}"
    return f"{hour} {number_words(rng.randrange(10, 60))}"


def _letters(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(LETTERS) for _ in range(count))


_LISTS = {
    "first": FIRST,
    "last": LAST,
    "place": PLACES,
    "thing": THINGS,
    "animal": ANIMALS,
    "food": FOODS,
    "adjective": ADJECTIVES,
    "past": PAST,
    "job": JOBS,
    "room": ROOMS,
    "adverb": ADVERBS,
    "weather": WEATHER,
    "month": MONTHS,
    "day": DAYS,
    "unit": UNITS,
    "code": CODE_WORDS,
    "ordinal": ORDINALS,
}
_MAKERS = {
    "number": _number,
    "time": _time,
    "digits": lambda rng: " ".join(ONES[rng.randrange(10)] for _ in range(rng.randrange(3, 7))),
    "letters": lambda rng: _letters(rng, rng.randrange(3, 6)),
    "one": lambda rng: _letters(rng, 1),
    "two": lambda rng: _letters(rng, 2),
}


def make_sentence(rng: random.Random) -> tuple[str, str]:
    """One sentence: (transcript, text for the synthesiser)."""
    template = rng.choice(TEMPLATES)
    written, position, known = "", 0, {}
    while (start := template.find("{", position)) >= 0:
        end = template.index("}", start)
        name = template[start + 1 : end]
        if name.startswith("spelled_"):
            word = " ".join(known[name.removeprefix("spelled_")])
        elif name in _LISTS:
            word = known[name] = rng.choice(_LISTS[name])
        else:
            word = _MAKERS[name](rng)
        written += template[position:start] + word
        position = end + 1
    written += template[position:]
    return transcript(written), spoken(written)


def transcript(marked: str) -> str:
    """The written form: marks of spelled letters removed."""
    return marked.replace("<", "").replace(">", "")


def spoken(marked: str) -> str:
    """The form for the synthesiser: spelled letters in capitals."""
    parts = marked.replace(">", "<").split("<")
    return "".join(p.upper() if i % 2 else p for i, p in enumerate(parts))


def sentences(count: int, seed: int, taken: set[str] | None = None) -> Iterator[tuple[str, str]]:
    """Different sentences, none of them in `taken`, which grows by those yielded."""
    rng = random.Random(seed)
    taken = set() if taken is None else taken
    made = 0
    while made < count:
        pair = make_sentence(rng)
        if pair[0] not in taken:
            taken.add(pair[0])
            made += 1
            yield pair


def vocabulary() -> set[str]:
    """All words that a sentence can contain."""
    words = {w for items in _LISTS.values() for item in items for w in item.split()}
    words |= {w for t in TEMPLATES for w in t.split() if not any(c in w for c in "{}<>")}
    words |= {w for n in (*range(100), 100, 1000) for w in number_words(n).split()}
    return words | set(LETTERS) | {"o'clock", "half", "past", "quarter", "to"}
