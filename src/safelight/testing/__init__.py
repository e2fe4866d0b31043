"""What a model family's own tests are made of, here or in another package: recipes, and suites over them.

A recipe (`recipes`) says how a tiny random checkpoint is built and what is asked of it; `tokenizers` and `shake` help
to build one. A test file of one class runs every suite over it:

    from safelight.testing.suites import FamilySuite

    class TestMyModel(FamilySuite):
        recipes = (MY_RECIPE,)

The fixtures come with pytest's plugin `safelight.testing.plugin`, which pytest finds by itself where this package is
installed; it needs the extra `test`. Nothing else in the package imports this part.
"""
