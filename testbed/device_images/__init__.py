"""From a blank card to a board that `testbed provision` finds ready: recipes, rendered for one board, checked, baked.

catalogue.py   which images there are, and for which boards
board.py       what a recipe is told about one board: names, keys, network
network.py     whether the network that the inventory says can be
render.py      a recipe and a board into ready-to-copy files
check.py       whether rendered files are what they should be
base.py        the publisher's file that an image starts from, and its checksum
build.py       a whole image, where its tools are: which recipe is built by which module
raspberry_pi.py    … by the publisher's image, with files in its boot partition (boot_partition.py)
virtual_board.py   … by Debian's packages (debian.py), and what QEMU is told to boot it (emulator.py)
"""
