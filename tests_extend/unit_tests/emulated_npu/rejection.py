"""How the emulator says no."""


def require(condition: bool, message: str) -> None:
    """Raise RuntimeError, as the real ops do, unless the condition holds."""
    if not condition:
        raise RuntimeError(f"emulated NPU op: {message}")
