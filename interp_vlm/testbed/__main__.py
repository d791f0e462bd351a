"""`python -m interp_vlm.testbed train FAMILY --out DIR` and `python -m interp_vlm.testbed card DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from interp_vlm.errors import InterpVLMError
from interp_vlm.testbed import NAMES

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train an embedded model, or measure one and write its card."""
    parser = argparse.ArgumentParser(prog="python -m interp_vlm.testbed", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train one family, measure it and write its card")
    training.add_argument("family", choices=NAMES)
    training.add_argument("--out", required=True, help="folder to write")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    card = commands.add_parser("card", help="measure a trained model and write its card")
    card.add_argument("folder")
    card.add_argument("--n", type=int, default=3000, help="questions at each difficulty")
    given = parser.parse_args(arguments)
    try:
        if given.command == "train":
            from interp_vlm.testbed.train import train

            train(given.family, given.out, given.seed, resume=given.resume)
        else:
            from interp_vlm.testbed.measure import write_card

            write_card(given.folder, given.n, progress=True)
    except InterpVLMError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the command's own output
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
