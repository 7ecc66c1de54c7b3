"""Export of a model as one file that draws digits without this package: a PyTorch program, or ONNX.

The file contains the weights and all steps of the sampler. Its inputs are noise, float32 (N, 1, 28, 28), standard normal, and
labels, int64 (N,), 0 to 9. Its output is images, uint8 (N, 28, 28).
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from flowmatch_mnist.sampling.generate import Flow, Sampler
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import replacing, write_errors


class Program(nn.Module):
    """A sampler and its network as one function: noise (N, 1, 28, 28), labels (N,) -> images uint8 (N, 28, 28)."""

    def __init__(self, flow: Flow, sampler: Sampler) -> None:
        super().__init__()
        self.net = flow.net
        self.flow = flow
        self.sampler = sampler
        self.times = flow.times(sampler)  # plain numbers, because an export does not see the values of tensors

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Draw images from noise."""
        *_, x1 = self.flow.states(self.flow.guided(labels, self.sampler), noise, self.sampler, times=self.times)
        return self.flow.units.decode(x1)


def export(flow: Flow, sampler: Sampler, path: Path) -> None:
    """Write the model to a file, `.pt2` or `.onnx`.

    Raises:
        UserError: if the file has another ending, the packages for ONNX are missing, or the sampler cannot be exported.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise UserError(f"cannot export to {path}: its name must end in .pt2 or .onnx")
    if sampler.solver == "dopri5" or sampler.churn:
        raise UserError(
            "cannot export dopri5 (it chooses its steps) or churn (it draws noise); use another --solver, and --churn 0"
        )
    example = (torch.randn(2, *flow.net.shape), torch.tensor([3, 7]))
    many = torch.export.Dim("n", min=1)
    # Make the weights contiguous. Otherwise the file would demand their memory layout from the program that loads it.
    flow.net.to(memory_format=torch.contiguous_format)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            Program(flow, sampler).eval(), example, dynamic_shapes={"noise": {0: many}, "labels": {0: many}}, strict=False
        )
        if path.suffix == ".pt2":
            with replacing(path) as temporary, temporary.open("wb") as file, write_errors():
                torch.export.save(program, file)
            return
        try:
            written = torch.onnx.export(program, input_names=["noise", "labels"], output_names=["images"], verbose=False)
        except ImportError as error:
            raise UserError(f"cannot write ONNX without {error.name or error}; run pip install -e '.[onnx]'") from error
        assert written is not None
        with replacing(path) as temporary:
            written.save(temporary)
