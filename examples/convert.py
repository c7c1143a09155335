"""
Other people's messages -> shards, and shards -> Parquet.

  python examples/convert.py import messages.parquet --output_dir messages
  python examples/convert.py import train.json --output_dir messages --model_name_or_path my/sender
  python examples/convert.py export messages --output_file messages.parquet

`import` reads Parquet, a folder of datasets' save_to_disk, and training records (.json, .jsonl). A row
has an `id` (or `task_id`); its states, as `hidden_state` (L lists of d numbers) or `hidden_state_path` (a
.npy, .safetensors or .pt file that holds one array); `plan` and `task`, where they are known. What
`export` wrote comes back bit for bit, because fp32 holds bf16 and fp16 exactly.
"""
import glob
import json
import os
import sys

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from common import Parser, UserError, atomic_path, is_text, one_line_errors, read_json  # noqa: E402
from examples.scratch import optional  # noqa: E402
from hf import DTYPES, first_line  # noqa: E402
from model import (  # noqa: E402
    HEADER_LIMIT, SHARD_FORMAT, LatentShards, free_name, header_bytes, make_record, open_shards, write_shard)

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def get_args(argv):
    parser = Parser(prog="convert.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("import", help="messages of other tools -> shards")
    p.add_argument("source", help="a .parquet, .json or .jsonl file, or a folder of save_to_disk")
    p.flag("--output_dir", ..., "a new directory for the shards")
    p.flag("--model_name_or_path", "unknown", "the sender's name, kept in the shards")
    p.flag("--split", "train", "of a save_to_disk folder with splits")
    p.flag("--shard_size_mb", 512.0, "start a new shard beyond this size")
    p = commands.add_parser("export", help="shards -> Parquet")
    p.add_argument("directory", help="--output_dir of a collection")
    p.flag("--output_file", ..., "the .parquet to write")
    return parser.parse_args(argv)


def read_rows(source, split):
    """A Parquet file, a save_to_disk folder or a JSON file -> its rows; of the first two one at a time."""
    if source.endswith((".json", ".jsonl")):
        rows = read_json(source)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{source}: expected a list of records")
        return rows
    datasets = optional("datasets")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our error says it in one line
    try:
        if os.path.isdir(source):
            data = datasets.load_from_disk(source)  # a memory map
            data = data[split] if isinstance(data, dict) else data
        else:  # streaming: without it the file would be copied into a cache first
            data = datasets.load_dataset("parquet", data_files=glob.escape(source), split="train",
                                         streaming=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{source} is no Parquet file, and no folder of save_to_disk with a split {split}: "
                        f"{first_line(error)}") from None
    return data.with_format("numpy")


def read_states(row):
    """The states of a row -> (L, d), in a dtype of shards. Raises whatever a foreign file causes."""
    path = row.get("hidden_state_path")
    if path is None:
        array = np.array(row["hidden_state"], dtype=np.float32)
        states = torch.from_numpy(array).to(DTYPES[row.get("dtype") or "fp32"])
    elif path.endswith(".npy"):
        states = torch.from_numpy(np.load(path))
    elif path.endswith(".safetensors"):
        states, = load_file(path).values()
    else:  # tensors are read, code is not run
        states = torch.load(path, weights_only=True, map_location="cpu")
    if states.dtype not in DTYPES.values():
        states = states.float()
    if states.dim() != 2 or not states.numel() or not states.isfinite().all():
        raise ValueError(f"found shape {tuple(states.shape)}, or NaN")
    return states


def read_row(row, model):
    """A row -> states (L, d), record and sender of its shard. Raises whatever a foreign row causes."""
    states = read_states(row)
    record = make_record({"task": str(row.get("task") or "")}, str(row.get("plan") or ""))
    sender = {"model": model, "dtype": NAMES[states.dtype], "format_version": SHARD_FORMAT}
    # `export_messages` keeps both whole
    record |= json.loads(row.get("record") or "{}")
    sender |= json.loads(row.get("sender") or "{}")
    return states, record, sender | {"hidden_size": states.shape[1]}


def import_messages(source, output_dir, model="unknown", split="train", shard_size_mb=512.0):
    """Rows of other tools, or of `export_messages` -> shards, of which one is in memory at a time."""
    if len(LatentShards(output_dir)):
        raise UserError(f"{output_dir} already holds messages: give a new --output_dir")
    sender, ids = None, set()
    latents, records, size, header = {}, {}, 0, 0  # of the shard that is filled now
    for n, row in enumerate(read_rows(source, split)):
        task_id = str(row.get("task_id", row.get("id")))
        where = f"{source}: row {n}, id {task_id}"
        if task_id in ids or task_id in ("None", "__metadata__") or not is_text(task_id):
            raise UserError(f"{where}: it needs an id (or task_id) that is a text and does not occur twice")
        ids.add(task_id)
        try:
            states, record, first_sender = read_row(row, model)
        except Exception as error:  # the user hears which row it was
            raise UserError(f"{where}: hidden_state, or the file of hidden_state_path, must hold L lists of "
                            f"d finite numbers, bf16, fp16 or fp32: {first_line(error)}") from None
        sender = sender or first_sender
        if states.shape[1] != sender["hidden_size"]:
            raise UserError(f"{where}: its states are {states.shape[1]} wide, those before it "
                            f"{sender['hidden_size']}")
        latents[task_id], records[task_id] = states, record
        size += states.nbytes
        header += header_bytes(task_id, record)
        if size + header >= shard_size_mb * 2**20 or header >= HEADER_LIMIT:
            write_shard(free_name(output_dir), latents, records, sender)
            latents, records, size, header = {}, {}, 0, 0
    if latents:
        write_shard(free_name(output_dir), latents, records, sender)
    print(f"wrote {len(ids)} messages to {output_dir}")


def export_messages(directory, output_file):
    """Messages -> one Parquet file, 16 at a time."""
    pyarrow, parquet = optional("pyarrow"), optional("pyarrow.parquet")
    shards = open_shards(directory)
    columns = dict.fromkeys(["task_id", "task", "plan", "dtype", "record", "sender"], pyarrow.string())
    columns["hidden_state"] = pyarrow.list_(pyarrow.list_(pyarrow.float32()))
    schema, ids = pyarrow.schema(columns), list(shards.records)
    with atomic_path(output_file) as path, parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(ids), 16):
            rows = []
            for task_id in ids[start:start + 16]:
                states, record = shards[task_id], shards.records[task_id]
                rows.append({
                    "task_id": task_id,
                    "task": record["task"],
                    "plan": record["plan"],
                    "hidden_state": list(states.float().numpy()),  # `dtype` says what it was
                    "dtype": NAMES[states.dtype],
                    "record": json.dumps(record),
                    "sender": json.dumps(shards.sender),
                })
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    print(f"wrote {len(ids)} messages to {output_file}")


@one_line_errors("convert.py")
def main(argv=None):
    args = get_args(argv)
    if args.command == "export":
        return export_messages(args.directory, args.output_file)
    import_messages(args.source, args.output_dir, args.model_name_or_path, args.split, args.shard_size_mb)


if __name__ == "__main__":
    main()
