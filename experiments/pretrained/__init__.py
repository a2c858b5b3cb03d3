"""Networks that others trained, as variables of :mod:`experiments.models`.

``load_resnet(Pretrained.RESNET20, data_dir=folder)`` reads
``folder/resnet_cifar10/resnet20.npz``; without ``data_dir`` the environment variable
``QUANTJAX_DATA`` names the folder. ``load_stories260k()`` reads ``folder/stories260K/`` and, with
neither named, downloads. ``scripts/measure_pretrained.py`` runs them in float and quantized.
"""

from experiments.pretrained.llama2c import Checkpoint, read_llama2c, write_llama2c
from experiments.pretrained.resnet import Pretrained, load_resnet, normalized
from experiments.pretrained.state_dict import (
    Imported,
    from_state_dict,
    read_resnet,
    to_state_dict,
    write_resnet,
)
from experiments.pretrained.stories260k import Storyteller, load_stories260k
from experiments.pretrained.tokenizer import (
    Tokenizer,
    decode,
    encode,
    read_tokenizer,
    tokenizer_of,
    write_tokenizer,
)

__all__ = [
    "Pretrained",
    "load_resnet",
    "normalized",
    "Imported",
    "from_state_dict",
    "to_state_dict",
    "read_resnet",
    "write_resnet",
    "Storyteller",
    "load_stories260k",
    "Checkpoint",
    "read_llama2c",
    "write_llama2c",
    "Tokenizer",
    "tokenizer_of",
    "read_tokenizer",
    "write_tokenizer",
    "encode",
    "decode",
]
