"""The mathematics behind `polytrope.ops.interpolate`: one module per kind of fit, all in float64 numpy."""
