"""Starting a distributed program and bringing its processes together.

`launch.local` runs processes on this machine, `launch.serve` one worker; `launch.world` is what
runs inside such a process, `za.init`.  The floor above the worker, of which it uses the surface.
"""
