/*
 * Does this emulator keep the CPU's flags across CMPXCHG8B and CMPXCHG16B?
 *
 * TCG before QEMU 8.0 computes the flags of both from a state that it has not brought up to date: what the last
 * arithmetic operation worked on becomes flags, up to bit 31. Bit 17 among them makes the next return from an
 * interrupt impossible, which a guest sees as a double fault (seen with Linux 6.12, whose kmalloc uses CMPXCHG16B).
 * Linux avoids the instruction where CPUID does not offer it.
 *
 * The last 64 bytes of a ROM, as probe.S is, and made in the same way with -Ttext=0xfffc0.
 */
        .set    EXIT, 0xf4              /* isa-debug-exit */
        .set    RIGHT, 0x2a
        .set    WRONG, 0x15

        .text
        .code16
start:  mov     $0x8000, %sp
        mov     $0x7f0ff000, %ecx
        add     %ecx, %edx              /* the operand that must not be taken for flags */
        cmpxchg8b 0x1000
        pushfl
        pop     %ebx
        mov     $RIGHT, %eax
        shr     $22, %ebx               /* EFLAGS has nothing above bit 21 (Intel SDM volume 1, 3.4.3) */
        jz      1f
        mov     $WRONG, %eax
1:      out     %eax, $EXIT
2:      hlt
        jmp     2b

        .org    0x30
        jmp     start
        .org    0x40
