from quietstar_ext.mixing_head.api import mixing_head as mixing_head
