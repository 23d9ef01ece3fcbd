"""What models cost: shapes, floating-point operations, cache bytes, and times."""
