"""What exporting a model takes of the host's memory, and how long.

    python benchmarks/export.py --size 0.37B --devices 8

Random weights of one of the paper's sizes are put into a checkpoint as that many devices leave it.
Then processes of their own export them, import the export, and read it as a run that starts from
it does. Memory is the peak that the kernel saw of private pages (VmHWM without the pages of mapped
files would need a sampler, so one reads RssAnon every few milliseconds).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from transfusion_jax.config import paper
from transfusion_jax.config.stored import dumps
from transfusion_jax.data.tokenizer import train_tokenizer
from transfusion_jax.model.published import parameters
from transfusion_jax.training.checkpoint import checksum
