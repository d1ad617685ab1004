"""``fuse=True`` and ``fold_conv=True``: the source of the methods that call frozen layers is
rewritten, and decides at run time what is done by one kernel.

    source    from a function to the tree of its source, and back
    rewrite   a method's source -> the same with steps
    steps     what rewritten methods call
    fold      convolutions that carry a layer
    classes   the classes that have rewritten methods
    report    what became of each layer
"""
