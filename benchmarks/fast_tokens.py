"""FAST on real and drawn chunks: what tokens cost, how many there are, and whether any is lost.

    python -m benchmarks.fast_tokens [--data WORK_DIR ...] [--sequences 100000]

Encoding against the reference's way (SciPy per chunk, one character a coefficient, a Hugging Face
tokenizer call per chunk, as users of the released processor do), same vocabulary, ids compared
before anything is timed; CPU time on one pinned core, in turns. Then sequences drawn from random
logits, with and without the grammar. `--data` fits and measures on prepared data sets (folders that
`launch.data inspect --row ...` or `stats` made) instead of drawn chunks. Needs transformers.
"""

import os

if __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["RAYON_NUM_THREADS"] = "1"

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import numpy as np
import scipy.fft

from gear_jax.tokenizers.fast import FastTokenizer, make_grammar, quantize

LIMIT = 0.9


def main():
    """Print the figures and one JSON line; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, nargs="*", default=[])
    parser.add_argument("--sequences", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    figures = {}
    sets = {path.name: real_chunks(path) for path in args.data} or {"drawn": drawn_chunks(4000)}
    for name, chunks in sets.items():
        figures[name] = measure(name, chunks)
    chunks = next(iter(sets.values()))[:512]
    tokenizer = FastTokenizer.fit(next(iter(sets.values())), vocab_size=1024)
    figures["throughput"] = throughput(tokenizer, chunks, args.pairs)
    figures["lost"] = lost(tokenizer)
    figures["malformed"] = malformed(tokenizer, args.sequences)
    fine = figures["throughput"] >= LIMIT and not figures["lost"] and not figures["malformed"][0]
    print(json.dumps({"ok": fine, **figures, "limit": LIMIT, "load": os.getloadavg()}))
    return 0 if fine else 1


def real_chunks(work):
    """Normalised 30-step chunks of a prepared data set; what is masked is zero."""
    from gear_jax.data.measure import Measured
    from gear_jax.data.prepared import stored_episodes
    from gear_jax.data.statistics import normalize_action
    from gear_jax.data.windows import make_chunks
    from gear_jax.types import ActionSpec

    spec = ActionSpec()
    episodes = stored_episodes(work / "prepared")
    places = [(e, t) for e in episodes for t in range(e.num_steps)]
    action, mask, _ = make_chunks([e for e, _ in places], [t for _, t in places], spec)
    measured = Measured(spec)
    measured.action.add(action, mask)
    measured.num_steps = len(action)
    normal = normalize_action(action, measured.statistics(work.name), spec)
    return np.where(mask, normal, np.float32(0)).clip(-1, 1)


def drawn_chunks(num):
    """Smooth bimanual chunks with two grippers."""
    rng = np.random.default_rng(0)
    times = np.linspace(0, 1, 30)[None, :, None]
    speed, bend, phase = rng.uniform(-1, 1, (3, num, 1, 20))
    chunks = 0.6 * speed * times + 0.4 * bend * np.sin(4 * times + 3 * phase)
    for gripper in (9, 19):
        chunks[:, :, gripper] = np.where(times[..., 0] > rng.random((num, 1)), 1.0, -1.0)
    return chunks.clip(-1, 1).astype(np.float32)


def measure(name, chunks):
    """Tokens and round-trip error of a vocabulary fitted on half of the chunks."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(chunks))
    train, held = chunks[order[::2]], chunks[order[1::2]]
    tokenizer = FastTokenizer.fit(train, vocab_size=2048)
    tokens = tokenizer.encode(held)
    decoded, whole = tokenizer.decode(tokens)
    lengths = [len(row) for row in tokens]
    error = np.sqrt(np.mean((decoded - held) ** 2))
    print(
        f"{name}: {len(train)} chunks fitted, {len(held)} held out: {tokenizer.vocab_size} tokens, "
        f"{np.mean(lengths):.0f} a chunk (longest {max(lengths)}), round trip RMS {error:.4f}, "
        f"greatest {np.abs(decoded - held).max():.3f} of -1 .. 1, whole {whole.all()}"
    )
    return {"tokens": float(np.mean(lengths)), "longest": max(lengths), "rms": float(error)}


def throughput(tokenizer, chunks, pairs):
    """Our chunks a CPU second over the reference's."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        theirs = PreTrainedTokenizerFast(
            tokenizer_file=f"{folder}/tokenizer.json", clean_up_tokenization_spaces=False
        )

    def reference():
        found = []
        for chunk in chunks:
            spectrum = scipy.fft.dct(chunk[None], axis=1, norm="ortho")[0]
            codes = np.around(spectrum * tokenizer.scale).ravel() - tokenizer.min_token
            text = "".join(map(chr, np.maximum(codes, 0).astype(int)))
            found.append(theirs(text)["input_ids"])
        return found

    ways = {"ours": lambda: tokenizer.encode(chunks), "reference": reference}
    first = {name: way() for name, way in ways.items()}
    assert all(map(np.array_equal, first["ours"], first["reference"])), "the ids differ"
    ratios = []
    for turn in range(pairs):
        spent = {}
        for name in ways if turn % 2 else reversed(ways):
            begin = time.process_time()
            ways[name]()
            spent[name] = (time.process_time() - begin) / len(chunks) * 1e6
        ratios.append(spent["reference"] / spent["ours"])
    ratio = statistics.median(ratios)
    print(f"encode: {spent['ours']:.0f} us a chunk, the reference {spent['reference']:.0f}: "
          f"{ratio:.2f} times its throughput, ids equal, limit {LIMIT}")  # fmt: skip
    return ratio


def lost(tokenizer, num=100_000):
    """Coefficients that random legal chunks lose."""
    rng, count = np.random.default_rng(1), 0
    for _ in range(num // 2000):
        chunks = rng.uniform(-1, 1, (2000, tokenizer.chunk_len, tokenizer.action_dim))
        chunks *= rng.random((2000, 1, 1))
        decoded, whole = tokenizer.decode(tokenizer.encode(chunks))
        same = quantize(decoded, tokenizer.scale) == quantize(chunks, tokenizer.scale)
        count += int((~same).sum()) + int((~whole).sum())
    print(f"{num} random legal chunks: {count} coefficients lost")
    return count


def malformed(tokenizer, num):
    """Sequences of random logits that do not decode: (under the grammar, without it)."""
    grammar, rng = make_grammar(tokenizer), np.random.default_rng(2)
    bad, free = 0, 0
    block = min(num, 5000)
    for _ in range(num // block):
        left, state = np.full(block, grammar.size, np.int32), np.zeros(block, np.int32)
        columns = []
        while left.any():
            allowed = grammar.mask(left, state)
            logits = rng.random(allowed.shape, np.float32)
            token = np.where(allowed, logits, -1).argmax(axis=1)
            live = left > 0
            after = grammar.advance(left, state, token)
            left, state = np.where(live, after[0], left), np.where(live, after[1], state)
            columns.append(np.where(live, token, -1))
        rows = [row[row >= 0] for row in np.stack(columns, axis=1)]
        bad += int((~tokenizer.decode(rows)[1]).sum())
        loose = [rng.integers(0, tokenizer.vocab_size, len(row)) for row in rows]
        free += int((~tokenizer.decode(loose)[1]).sum())
    rate = f"{free / num:.1%}"
    print(f"{num} sequences of random logits: {bad} malformed under the grammar, {rate} without")
    return bad, free / num


if __name__ == "__main__":
    raise SystemExit(main())
