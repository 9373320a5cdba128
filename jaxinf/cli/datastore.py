"""`jaxinf datastore`: text that drafts are looked up in."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxinf.cli import output
from jaxinf.cli.options import add_json, count

EPILOG = """\
examples:
  jaxinf datastore notes.txt ./book --model ./llama --out llama-notes.npz
  jaxinf datastore ./src --glob '*.py' --model stdlib --out src.npz
  jaxinf generate 'def read(' --draft src.npz

SRC is a file of UTF-8 text, a folder of such files, or a .npy of token ids [T]. Every file is a text by itself.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("sources", nargs="+", metavar="SRC", help="text files, folders of them, .npy of token ids")
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="whose tokenizer to use: embedded model, folder, or owner/name on the Hugging Face Hub",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the .npz to write")
    parser.add_argument("--glob", default="*", metavar="P", help="which files of folders (default: all)")
    parser.add_argument(
        "--order",
        type=count,
        default=32,
        metavar="N",
        help="sort by so many tokens (default: 32); drafts and what is compared for them may have so many together",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from jaxinf.checkpoint import read_spec
    from jaxinf.generation.speculative import Datastore, tokenizer_hash
    from jaxinf.lm import locate
    from jaxinf.lm.tokenizer import Tokenizer
    from pallas_kernels.errors import InputError

    out = Path(args.out)
    if out.suffix != ".npz":
        raise InputError(f"--out {out} must end in .npz")
    if out.exists() and not args.overwrite:
        raise InputError(f"{out} is there already; give another name, or --overwrite")
    files = _files(args.sources, args.glob)
    folder = locate(args.model)
    tokenizer, vocab = Tokenizer.from_folder(folder), read_spec(folder).vocab
    if tokenizer is None and any(file.suffix != ".npy" for file in files):
        raise InputError(f"{folder} has no tokenizer, so text cannot be read; give .npy files of token ids")
    sizes = [file.stat().st_size for file in files]

    def texts() -> Iterator[Sequence[int]]:
        with output.progress("reading") as progress:
            for i, file in enumerate(files):
                yield _ids(file, tokenizer)
                progress(sum(sizes[: i + 1]), sum(sizes))

    read = list(texts())
    with output.progress("sorting", "rounds") as progress:
        name = None if tokenizer is None else tokenizer_hash(tokenizer)
        store = Datastore.build(read, vocab, tokenizer=name, order=args.order, progress=progress)
    store.save(out, overwrite=args.overwrite)
    tokens, written = sum(map(len, read)), out.stat().st_size
    if args.json:
        document = {"target": str(out), "model": str(folder), "files": len(files), "tokens": tokens}
        output.print_json(document | {"vocab": vocab, "order": args.order, "bytes": written})
    else:
        print(f"{out}: {output.many(tokens)} tokens of {len(files)} files, {output.size(written)}")
    return 0


def _files(sources: Sequence[str], pattern: str) -> list[Path]:
    from pallas_kernels.errors import InputError

    found = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(path for path in source.rglob(pattern) if path.is_file())
            if not inside:
                raise InputError(f"{source} has no files of the pattern {pattern!r}; give another --glob")
            found += inside
        elif source.is_file():
            found.append(source)
        else:
            raise InputError(f"there is no file or folder {source}")
    return found


def _ids(file: Path, tokenizer) -> Sequence[int]:
    import numpy as np

    from pallas_kernels.errors import InputError

    if file.suffix == ".npy":
        try:
            return np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise InputError(f"{file} is no array of token ids: {error}") from None
    try:
        return tokenizer.encode(file.read_text(encoding="utf-8"), add_special_tokens=False)
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
