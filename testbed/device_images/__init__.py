"""From a blank card to a board that `testbed provision` finds ready: recipes, rendered for one board, checked, baked.

catalogue.py   which images there are, and for which boards
board.py       what a recipe is told about one board: names, keys, network
render.py      a recipe and a board into ready-to-copy files
check.py       whether rendered files are what they should be
base.py        the publisher's file that an image starts from, and its checksum
build.py       a whole image, where its tools are: which recipe is built by which module
raspberry_pi.py    … by the publisher's image, with files in its boot partition (boot_partition.py)
"""
