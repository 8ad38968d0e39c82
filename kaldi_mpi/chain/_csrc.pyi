from typing import Any

# Declared in csrc/*.h; cffi's objects have no static types.
ffi: Any
lib: Any
