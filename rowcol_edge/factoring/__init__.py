"""Find the row and column spaces a model uses and rewrite its layers to use just those.

Importing this package imports no torch; its modules that need it import it themselves
(``costs``, ``plan`` and ``ranks`` do not).
"""
