"""What a person asks for, as pydantic models: VM, disk, NIC, image, recipe. Pure: touches nothing, imports
only base."""
