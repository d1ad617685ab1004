"""``fuse=True`` and ``fold_conv=True``: the source of the methods that call frozen layers is rewritten,
and decides at run time what is done by one kernel (section "How fusion works" of CONTRIBUTING.md).

    roles     what the calls in a method are of
    rewrite   a method's source with steps (with flow: what may be pending where; source: from a
              function to its tree and back)
    steps     what rewritten methods call
    fold      convolutions that carry a layer
    classes   the classes that have rewritten methods
    report    what became of each layer
"""
