__version__ = "0.1.0"

def __getattr__(name):
    "`collat.show`, looked up when it is asked for: importing the package stays light."
    if name != 'show': raise AttributeError(f"module 'collat' has no attribute '{name}'")
    from .listen import show
    return show
