"""The shapes of data that are not there."""

from experiments.data.pools import Column, PoolShape, Shapes


def shapes_of(inputs, num_classes, num_train, tasks=()) -> Shapes:
    """Those of one train pool with one input and a class."""
    pool = PoolShape("train", "train", num_train, (("input", tuple(inputs), "float32"), ("label", (), "int32")))
    columns = (("input", Column("input", "real")), ("label", Column("target", "class", size=num_classes)))
    return Shapes((pool,), columns, "label", tasks)
