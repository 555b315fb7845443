"""The command line: `python -m adamax_ext demo` and `python -m adamax_ext info`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import adamax_ext

_DEMO_PACKAGES = ("sklearn", "matplotlib", "tqdm")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, received {value}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, received {value}")
    return value


def _png(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():  # better said before the training than after
        raise argparse.ArgumentTypeError(f"not a file in an existing folder: {text!r}")
    return path


def _info() -> int:
    info = adamax_ext.build_info()
    width = max(map(len, info))
    for key, value in info.items():
        text = ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else value
        print(f"{key:<{width}}  {text}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    try:
        from adamax_ext import demo
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _DEMO_PACKAGES:
            raise
        print(
            f"the demonstration needs {error.name}, which is not installed: "
            'pip install "adamax_ext[demo]"',
            file=sys.stderr,
        )
        return 1
    return demo.run(args.output, args.epochs or demo.EPOCHS, args.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the program's name; by default those of this process.

    Returns
    -------
    int
        Exit status.

    Raises
    ------
    SystemExit
        With status 2 for arguments that make no sense, 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(prog="python -m adamax_ext", description=adamax_ext.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small network on handwritten digits")
    demo.add_argument("--output", type=_png, default=Path("adamax_demo.png"), help="the picture")
    demo.add_argument("--epochs", type=_count, help="passes over the data (few miss the target)")
    demo.add_argument("--seed", type=_seed, default=0, help="of weights, order and noise")
    commands.add_parser("info", help="say how this package was built")
    args = parser.parse_args(argv)
    return _demo(args) if args.command == "demo" else _info()


if __name__ == "__main__":
    sys.exit(main())
