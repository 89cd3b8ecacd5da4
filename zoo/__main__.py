"""`python -m zoo`: look at the zoo, use weights, prepare a machine, measure."""

import importlib
import os
import sys

COMMANDS = {
    "list": "attention variants and what they define; models, tasks, data, weights",
    "show": "one variant, or the card of trained weights",
    "predict": "use trained weights on files",
    "convert": "swap the attention of trained weights",
    "export": "write trained weights as ONNX or torch.export programs",
    "package": "move a finished run's best weights into the zoo under their name",
    "analyse": "attention sinks of trained weights, and the heads that they need",
    "verify": "evaluate weights again and compare with their cards",
    "report": "leaderboard over any run folders",
    "fetch": "bring data sets into the cache, for machines without network",
    "docs": "write README's tables and the pages in docs/tasks anew",
    "bench": "time a task's training step or the operations",
}


def main(argv: list[str]) -> int:
    from zoo.errors import ZooError, unknown

    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m zoo COMMAND ...\n")
        for name, text in COMMANDS.items():
            print(f"  {name:8} {text}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise unknown("command", argv[0], COMMANDS)
        return importlib.import_module(f"zoo.cli.{argv[0]}").main(argv[1:])
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder without permission
        print(f"error: {error.strerror or error}: {error.filename2 or error.filename}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
