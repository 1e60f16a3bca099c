"""C++ for CPUs, compiled on first use, never needed: each source beside its binding; `build.py` compiles and loads."""
