"""Models of other libraries as functions ``f(params, ...)``; import the module of the one in use.

Nothing is imported here, so that no library is loaded that is not used. Linen needs no adapter.
"""
