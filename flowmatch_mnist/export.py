"""A model as one file that draws digits without this package: a PyTorch program, or ONNX.

    python -m flowmatch_mnist.export --out digits.pt2
    python -m flowmatch_mnist.export --out digits.onnx           (pip install -e '.[onnx]')

The file holds the weights and all steps of the sampler. It takes noise, float32 (N, 1, 28, 28), standard normal, and labels,
int64 (N,), 0 to 9, and gives images, uint8 (N, 28, 28):

    torch.export.load("digits.pt2").module()(torch.randn(3, 1, 28, 28), torch.tensor([7, 7, 7]))
    onnxruntime.InferenceSession("digits.onnx").run(None, {"noise": noise, "labels": labels})
"""

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from flowmatch_mnist.errors import Parser, UserError, exit_on_error
from flowmatch_mnist.files import replacing
from flowmatch_mnist.generate import Flow, Sampler, to_images
from flowmatch_mnist.models import find, load_digits, with_changes


class Drawing(nn.Module):
    """A sampler and its network as one function: noise (N, 1, 28, 28), labels (N,) -> images uint8 (N, 28, 28)."""

    def __init__(self, flow: Flow, sampler: Sampler) -> None:
        super().__init__()
        self.net = flow.net
        self.flow = flow
        self.sampler = sampler
        self.times = flow.times(sampler)  # numbers by now: what an export sees of tensors is no values

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Draw."""
        *_, x1 = self.flow.states(self.flow.guided(labels, self.sampler), noise, self.sampler, times=self.times)
        return to_images(x1, self.flow.pixels)


def export(flow: Flow, sampler: Sampler, path: Path) -> None:
    """Write the model to a file, `.pt2` or `.onnx`.

    Raises:
        UserError: if the ending is another, what writes ONNX is not installed, or the sampler cannot be written down.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise UserError(f"{path} must end in .pt2 or .onnx")
    if sampler.solver == "dopri5" or sampler.churn:
        raise UserError("steps that are chosen or drawn on the way cannot be exported; ask for another --solver, and churn 0")
    example = (torch.randn(2, *flow.net.shape), torch.tensor([3, 7]))
    many = torch.export.Dim("n", min=1)
    # Contiguous, since another layout of the weights would be asked of whoever loads the file.
    flow.net.to(memory_format=torch.contiguous_format)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            Drawing(flow, sampler).eval(), example, dynamic_shapes={"noise": {0: many}, "labels": {0: many}}, strict=False
        )
        if path.suffix == ".pt2":
            with replacing(path) as temporary:
                torch.export.save(program, temporary)
            return
        try:
            written = torch.onnx.export(program, input_names=["noise", "labels"], output_names=["images"], verbose=False)
        except ImportError as error:
            raise UserError(f"ONNX needs {error.name or error}; run pip install -e '.[onnx]'") from error
        assert written is not None
        with replacing(path) as temporary:
            written.save(temporary)


def main() -> None:
    """Write a file."""
    parser = Parser(prog="python -m flowmatch_mnist.export", description=__doc__)
    add = parser.add_argument
    add("--weights", help="a checkpoint, or a name of weights in the package (default: as sample.py's)")
    add("--out", type=Path, default=Path("digits.pt2"), help=".pt2 or .onnx (default: digits.pt2)")
    add("--steps", type=int, help="of the solver (default: the model's own)")
    add("--solver", help="(default: the model's own)")
    add("--guidance", type=float, help="(default: the model's own)")
    options = parser.parse_args()
    path, flow, sampler = load_digits(find(options.weights) if options.weights else None, "cpu")
    sampler = with_changes(flow, sampler, {name: getattr(options, name) for name in ("steps", "solver", "guidance")})
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    export(flow, sampler, options.out)
    print(f"wrote {options.out}, {path} with {sampler.description()}")


if __name__ == "__main__":
    with exit_on_error():
        main()
