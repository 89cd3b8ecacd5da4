"""Text to token numbers: normalisation, characters and byte-pair pieces. Token 0 is padding and blank, 1 starts, 2 ends."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from data.errors import DataError

SPECIAL = ("<pad>", "<s>", "</s>")
PLAIN_CHARACTERS = " 'abcdefghijklmnopqrstuvwxyz"


def normalise(text: str, version: str) -> str:
    """Normalise a transcript.

    Args:
        text: As the corpus has it.
        version: "plain-1": lower case, accents and punctuation but the apostrophe removed, dashes and white space to
            single spaces; "lower-1": lower case and single spaces; "none": as it is.
    """
    if version == "none":
        return text
    text = " ".join(text.lower().split())
    if version == "lower-1":
        return text
    if version != "plain-1":
        raise DataError(f"data.normaliser={version!r}: choose plain-1, lower-1 or none")
    text = text.replace("\u2019", "'").replace("-", " ")
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^\w\s']|_", " ", text).split())


class Tokeniser:
    """Common part: pieces by number, special ones first; a piece's leading space is a real space.

    Args:
        pieces: All pieces, the special ones included.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = list(pieces)
        self.index = {piece: i for i, piece in enumerate(self.pieces)}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Token numbers of a normalised text.

        Raises:
            DataError: A character that the vocabulary lacks; the message names it.
        """
        raise NotImplementedError

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of token numbers; special tokens are left out."""
        return "".join(self.pieces[t] for t in tokens if t >= len(SPECIAL)).strip()


class CharTokeniser(Tokeniser):
    """One token a character.

    Args:
        characters: The alphabet.
    """

    def __init__(self, characters: Iterable[str] = PLAIN_CHARACTERS) -> None:
        super().__init__([*SPECIAL, *sorted(set(characters))])

    def encode(self, text: str) -> list[int]:
        unknown = sorted({c for c in text if c not in self.index})
        if unknown:
            raise DataError(f"characters {' '.join(map(repr, unknown))} are not in the vocabulary")
        return [self.index[c] for c in text]


class BpeTokeniser(Tokeniser):
    """Byte-pair pieces learned from the training texts with the package `tokenizers`.

    Args:
        texts: Normalised training texts.
        size: Number of pieces wanted, special ones included.
        characters: Alphabet; other characters are refused.
    """

    def __init__(self, texts: Iterable[str], size: int, characters: Iterable[str]) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        characters = sorted(set(characters) - {" "})
        if size < len(characters) + len(SPECIAL) + 1:
            raise DataError(
                f"data.bpe_size={size} is less than the {len(characters) + 4} characters and specials"
            )
        model = Tokenizer(models.BPE(unk_token=None))
        model.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL),
            initial_alphabet=[*characters, "\u2581"],
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        vocabulary = model.get_vocab()
        super().__init__([p.replace("\u2581", " ") for p in sorted(vocabulary, key=vocabulary.get)])
        self._model, self._characters = model, set(characters) | {" "}

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - self._characters)
        if unknown:
            raise DataError(f"characters {' '.join(map(repr, unknown))} are not in the vocabulary")
        return self._model.encode(text).ids
