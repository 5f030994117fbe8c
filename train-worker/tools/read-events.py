"""Reads an event file with TensorBoard's own reader and prints one line a value.

    pip install tensorboard
    python read-events.py ../src/report/golden/events.tfevents

The golden file of `src/report/tensorboard.rs` was seen to give
    1 train/loss 2.5
    1 train/lr 9.999999747378752e-05
    2 eval/loss 3.25
"""

import sys

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

for event in EventFileLoader(sys.argv[1]).Load():
    for value in event.summary.value:
        print(event.step, value.tag, float(tensor_util.make_ndarray(value.tensor)))
