"""From a listing to a plan: which entries make which shard, and where a shard finds them. Pure.

A source lists **entries**; `select` takes what the globs name and ties the files of a selected
folder into one **unit**; `split` cuts the units into shards. Order is kept throughout: of the
options, then by path.
"""

from bacalhau_node.sharding.blocks import chunks, plan_block, read_block
from bacalhau_node.sharding.entries import (
    ContentRef,
    Doubtful,
    Entry,
    LocalStamp,
    Reference,
    Unit,
    Unusable,
    UrlRef,
    shown,
)
from bacalhau_node.sharding.places import check_places, container_path, mounts
from bacalhau_node.sharding.selecting import is_hidden, refuse_unusable, select
from bacalhau_node.sharding.splitting import balanced_cuts, split

__all__ = [
    "ContentRef",
    "Doubtful",
    "Entry",
    "LocalStamp",
    "Reference",
    "Unit",
    "Unusable",
    "UrlRef",
    "balanced_cuts",
    "check_places",
    "chunks",
    "container_path",
    "is_hidden",
    "mounts",
    "plan_block",
    "read_block",
    "refuse_unusable",
    "select",
    "shown",
    "split",
]
