__version__ = "0.1.0"

LOOKED_UP = {'CoLLAT': ('model', 'CoLLAT'), 'load': ('listen', 'open_model'), 'show': ('listen', 'show')}


def __getattr__(name):
    "`CoLLAT`, `load` and `show`, looked up when they are asked for: importing the package stays light."
    if name not in LOOKED_UP:
        raise AttributeError(f"module 'collat' has no attribute '{name}'")
    from importlib import import_module
    module, attribute = LOOKED_UP[name]
    return getattr(import_module(f'collat.{module}'), attribute)


def __dir__():
    return sorted([*globals(), *LOOKED_UP])
