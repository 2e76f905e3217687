"""The virtual lab: hosts of our own on this machine, to rehearse an experiment on before boards are booked.

A host is what `ssh` sees as a machine: an address, an OpenSSH server with its own host key, users, a file system, a
memory cap, and, where wanted, the face of a board (a persona).  It is made of Linux namespaces; another kind of host
(a virtual machine) is another class with the verbs of `testbed.lab.host.LabHost`.

What the parts do: `lab` brings hosts up and down; one `keeper` process per host outlives it and starts the host's own
first process, `init`, in the view that `view` mounts; `groups` caps its memory, `network` plugs it in, `relay` delays
and loses its packets where the kernel cannot.

A virtual host is no security boundary: root inside is root of this machine in namespaces of its own.
"""
