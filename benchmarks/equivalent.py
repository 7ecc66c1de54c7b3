"""Mutants that are no mistake, and why. They are not tried."""

EQUIVALENT = {
    "flow.times: sign flipped in `torch.arange(count, device=generator.device) / count + offset`": (
        "the offset is uniform modulo 1"
    ),
    "flow.times: sign flipped in `positions.to(widest_float(positions.device)) * golden + batch_index * root_two`": (
        "either way, another shift per batch"
    ),
}
