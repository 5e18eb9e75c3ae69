"""A paper in a package: each module is one part that a file in conf/ names."""
