"""The life of a quantized layer's weights, for any engine: create, arrive, process, apply."""
