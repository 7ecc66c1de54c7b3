"""Write a model as one file that draws digits without this package: a PyTorch program, or ONNX.

    python -m flowmatch_mnist.export --out digits.pt2
    python -m flowmatch_mnist.export --out digits.onnx           (pip install -e '.[onnx]')

The file contains the weights and all steps of the sampler. Its inputs are noise, float32 (N, 1, 28, 28), standard normal, and
labels, int64 (N,), 0 to 9. Its output is images, uint8 (N, 28, 28):

    torch.export.load("digits.pt2").module()(torch.randn(3, 1, 28, 28), torch.tensor([7, 7, 7]))
    onnxruntime.InferenceSession("digits.onnx").run(None, {"noise": noise, "labels": labels})
"""

import logging
from pathlib import Path

from rich.console import Console

from flowmatch_mnist.sampling.export import export
from flowmatch_mnist.sampling.weights import load_digits, weights_path, with_changes
from flowmatch_mnist.support.commands import CommandParser
from flowmatch_mnist.support.errors import exit_on_error


def main() -> None:
    """Parse the command line and write the file."""
    parser = CommandParser(prog="python -m flowmatch_mnist.export", description=__doc__)
    add = parser.add_argument
    add("--weights", help="a checkpoint, or a name of weights in the package (default: the newest run, else mnist)")
    add("--out", type=Path, default=Path("digits.pt2"), help="file to write, .pt2 or .onnx (default: digits.pt2)")
    add("--steps", type=int, help="number of solver steps (default: the model's own)")
    add("--solver", help="solver (default: the model's own)")
    add("--guidance", type=float, help="guidance scale (default: the model's own)")
    add("--guidance-power", type=float, help="0 guides all digits alike (default: the model's own)")
    add("--churn", type=float, help="noise renewed during sampling; a file cannot draw noise, so set 0 for a model with churn")
    options = parser.parse_args()
    path, flow, sampler = load_digits(weights_path(options.weights) if options.weights else None, "cpu")
    changes = ("steps", "solver", "guidance", "guidance_power", "churn")
    sampler = with_changes(flow, sampler, {name: getattr(options, name) for name in changes})
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with Console(stderr=True).status("exporting"):  # shown only in a terminal
        export(flow, sampler, options.out)
    print(f"wrote {options.out} from {path} with {sampler.description()}")


if __name__ == "__main__":
    with exit_on_error():
        main()
