# The boot code of the disk for SeaBIOS (firmware.sh): starts the boot sector of the first
# partition, as that of SYSLINUX does.
#
# It first overwrites its own place, where that sector goes. QEMU without KVM keeps the code that it
# has translated until the processor writes there, and does not see the writes of a vhost-user
# device: without this the processor would execute this code again.

        .code16
        .globl start
start:  xorw %ax, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movw $0x7c00, %sp
        cld
        movw $0x7c00, %si               # go on at 0x600, where it is linked to
        movw $0x600, %di
        movw $256, %cx
        rep movsw
        ljmp $0, $moved
moved:  movw $0x7c00, %di
        movw $256, %cx
        rep stosw
        movl 0x600 + 446 + 8, %eax      # of the first entry in the table: its first sector
        movl %eax, sector
        movw $packet, %si
        movb $0x42, %ah                 # %dl is still the drive
        int $0x13
        jc failed
        movw $0x600 + 446, %si
        ljmp $0, $0x7c00
failed: hlt
        jmp failed
packet: .byte 16, 0
        .word 1                         # sectors
        .word 0x7c00, 0                 # to here
sector: .long 0, 0
