"""Flax modules for several tasks on shared features. The rest of the library does not need them, nor Flax."""

from auxjax.models.convnet import ConvNet as ConvNet
from auxjax.models.mlp import MLP as MLP
from auxjax.models.outputs import Outputs as Outputs
from auxjax.models.outputs import head_on as head_on
from auxjax.models.vgg import VGG as VGG
