"""What can go wrong with data: there is no way to it, or a file is not what it should be.

They derive from quantjax's own base, so that a command line catches them with the others, and live
here because the library raises neither.
"""

from __future__ import annotations

from quantjax.errors import QuantjaxError


class DataUnavailableError(QuantjaxError, ValueError):
    """A set that no folder holds and no mirror served, or whose name nobody knows.

    ``load(SetName.MNIST)`` fails without a network. Name a folder that holds the set by
    ``data_dir=``, ``--data-dir`` or the environment variable ``QUANTJAX_DATA``.
    """


class DataFileError(QuantjaxError, ValueError):
    """A file that is there and is not the one that was asked for: another checksum, size or header.

    ``load(SetName.MNIST, data_dir=folder)`` fails where a copy into the folder broke off half-way.
    Delete the file that the message names, and copy it again.
    """
