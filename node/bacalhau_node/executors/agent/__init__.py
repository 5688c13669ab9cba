"""The agent: runs the shards of one job inside a slot. Standard library only, Python 3.8 or later.

Theory of operation
===================
The host starts `python -s -u agent/__main__.py` (or `-I -u`) with two byte streams, file descriptors 0 and 1,
keeps both, and talks in frames (`frames.py` has the table). The end of descriptor 0 is a dead-man's switch:
everything is killed.

Three kinds of process:

* The **parent** imports nothing but the standard library. It reads and writes frames, starts shards one
  after another, reads what they print, enforces limits, and removes whatever a shard left running.
* The **template** is forked from it. It imports what the cell imports, freezes the collector, compiles the
  cell, and then only forks on request: all that shards have in common is done in it, once. One that dies,
  or that must have other imports, is replaced by a new one.
* A **shard** is one forked child of the template, with its own session. It runs the cell, sends its value by
  a pipe, and exits.

The parent is a subreaper, so a process that a shard started becomes the parent's child when the shard is
gone, whatever it did to hide. After each shard the parent stops and kills its descendants until none is left.

The pipes for stdout, stderr and the value are made once and inherited; they are empty between two shards,
because nobody who could write to them is alive then. Text goes out in whole lines; an unfinished line
follows after 50 ms. The parent never waits for the host: up to 16 MB of frames are kept, then the shard's
pipes are left unread, and so the shard waits.

What a cell finds
=================
`inputs`, `outputs`, `shard` and its variables as globals of `__main__`; `sys.argv == ["cell"]`; stdin is empty; the
working folder and `TMPDIR` are a private folder that is removed afterwards; `random` and `numpy.random` are
seeded from (job, shard). Lines of the cell keep the numbers and the file name that they have in the notebook.

Where things are
================
A module imports only those in the lines below its own.

    __main__                  the entry: nothing of this folder can be imported by a short name
    supervise                 the parent: its loop, the orders of the host
    template                  the process that imports and forks, and the parent's end of it
    shard                     the process that runs the cell: from the fork to the exit
    cell                      the cell: read, compiled, evaluated; the names that it finds
    variables seeds values    what came with the cell; its random numbers; its value, encoded
    tables pictures           values that are Arrow tables; values that are shown
    running                   the shard that runs now, as the parent sees it, and how it ended
    host text watch           frames to and from the host; pipes and lines; measured limits
    travel failures tree      a value on its way; exceptions as data; processes below us
    frames words folders      the table of frames; text for people; folders
"""
