"Smaller and faster models by search. The package can be called: `gfopt.compress(model, ...)` is `gfopt.compress.front.compress` whatever was imported first."

import sys
from types import ModuleType


class _Package(ModuleType):
    def __call__(self, *args, **settings):
        from .front import compress

        return compress(*args, **settings)


sys.modules[__name__].__class__ = _Package
