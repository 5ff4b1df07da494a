"""Engines that run quantized models: thin, everything that two of them need lives above."""


def register() -> None:
    """Make moeq's quantizer known to transformers. Safe to call again."""
    from moeq.engines.transformers import register_with_transformers

    register_with_transformers()
