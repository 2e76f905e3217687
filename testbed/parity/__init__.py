"""How far two runs agree, such as an emulated one and one on boards: peaks, phases, energy, quality.

comparison   two runs beside each other, as plain data; devices matches their devices
verdicts     a sentence for each part
text         how it is printed
"""
