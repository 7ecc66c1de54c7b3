"""Mutants that are no mistake, and why. They are not tried."""

EQUIVALENT = {
    "data.reflow: argument u ignored in `ReflowDataModule.encode`": "pairs come with their noise; the argument is its base's",
    "networks.base: argument until ignored in `Network.forward`": "it is abstract",
    "sampling.units: argument u ignored in `Units.encode`": "it is abstract",
    "sampling.units: argument u ignored in `Plane.encode`": "places have no levels to take noise; the argument is all units'",
    "flow.times: sign flipped in `torch.arange(count, device=generator.device) / count + offset`": (
        "the offset is uniform modulo 1"
    ),
    "flow.times: sign flipped in `positions.to(widest_float(positions.device)) * golden + batch_index * root_two`": (
        "either way, another shift per batch"
    ),
}
