"""``fuse=True`` and ``fold_conv=True``: the source of the methods that call frozen layers is
rewritten, and decides at run time what is done by one kernel.

    source    from a function to the tree of its source, and back
    names     which names in a method may be layers, or may hold what is pending
    waiting   for how long something may wait there
    rewrite   a method's source -> the same with steps
    kinds     which classes compute what is known
    pending   what waits for the next layer, and how it is computed
    steps     what rewritten methods call
    fold      convolutions that carry a layer
    classes   the classes that have rewritten methods
    report    what became of each layer

For ``summary`` and ``fold_for_inference`` only:

    uses      which layers and sums read what each other make
    objects   what an expression is, as the attributes of an instance are now
    flow      what reads what, by the sources of methods
"""
