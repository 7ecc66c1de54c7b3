"""Draw pairs of noise and data with a teacher. A student of reflow trains on these pairs.

    python -m flowmatch_mnist.reflow --teacher few-step --pairs 80000 --out pairs
    python train.py --config configs/reflow.yaml

`data/reflow.py` explains reflow.
"""

from pathlib import Path

from flowmatch_mnist.data.reflow import SHARD, draw_pairs
from flowmatch_mnist.sampling.weights import load, newest_or_packaged, weights_path, with_changes
from flowmatch_mnist.support.commands import CommandParser
from flowmatch_mnist.support.devices import check_device, default_device
from flowmatch_mnist.support.errors import UserError, exit_on_error


def main() -> None:
    """Parse the command line and draw the pairs."""
    parser = CommandParser(prog="python -m flowmatch_mnist.reflow", description=__doc__)
    add = parser.add_argument
    add("--teacher", help="a checkpoint, or a name of weights in the package (default: the newest run, else mnist)")
    add("--pairs", type=int, default=20_000, help="number of pairs, rounded up to files of 2,500 (default: 20000)")
    add("--out", type=Path, default=Path("pairs"), help="folder for the files (default: pairs)")
    add("--steps", type=int, help="steps of the teacher's solver (default: the model's own)")
    add("--solver", help="solver of the teacher (default: the model's own)")
    add(
        "--guidance",
        type=float,
        help="guidance scale of the teacher; it is part of the pairs, so the student needs none (default: the model's own)",
    )
    add("--guidance-power", type=float, help="0 guides all samples alike (default: the model's own)")
    add("--seed", type=int, default=0, help="random seed of the noise (default: 0)")
    add("--batch-size", type=int, help="samples drawn at a time (default: 100 on a CPU, 1000 on a GPU)")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, mps, ... (default: a GPU if available)")
    options = parser.parse_args()
    if options.pairs < 1 or (options.batch_size is not None and options.batch_size < 1):
        raise UserError("--pairs and --batch-size must be at least 1")
    if options.out.is_file():
        raise UserError(f"--out {options.out} is a file; choose a folder")
    check_device(options.device)
    path = weights_path(options.teacher) if options.teacher else newest_or_packaged()
    flow, sampler = load(path, options.device)
    changes = {name: getattr(options, name) for name in ("steps", "solver", "guidance", "guidance_power")}
    # Without churn, because with new noise on the way, a sample would not belong to the noise that it started from.
    sampler = with_changes(flow, sampler, {**changes, "churn": 0.0})
    print(f"drawing with {path} ({sampler.description()}, seed {options.seed})", flush=True)
    files, drawn = draw_pairs(options.out, flow, sampler, options.pairs, seed=options.seed, batch_size=options.batch_size)
    print(f"{options.out} holds {files * SHARD:,} pairs in {files} files, {drawn} of them drawn now")


if __name__ == "__main__":
    with exit_on_error():
        main()
