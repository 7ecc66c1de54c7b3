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
    "training.parser: argument ex ignored in `ConfigParser.error`": "jsonargparse hands it over; one line says it all",
    "training.saving: argument storage_options ignored in `CheckpointFiles.save_checkpoint`": "Lightning's; files are local",
    "training.saving: argument map_location ignored in `CheckpointFiles.load_checkpoint`": "Lightning's; it is read on the CPU",
    "training.saving: argument weights_only ignored in `CheckpointFiles.load_checkpoint`": "Lightning's; it is always so",
}
