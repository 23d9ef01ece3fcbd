"""`torch_compile`: the decoder layers one by one, since what is around them depends on the data."""

from saccade.families import Family


def compile_layers(family: Family, backend: str | None = None, mode: str | None = None) -> None:
    """Compile each decoder layer in place, for sequences of any length. Names of weights stay as they are.

    A fast and a slow step, a teacher without gradient and a batch of another size share the compiled code where they
    differ in lengths alone.

    Args:
        backend, mode: as for `torch.compile`.
    """
    for layer in family.language_layers:
        layer.compile(backend=backend or "inductor", mode=mode, dynamic=True)
