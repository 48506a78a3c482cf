/*
 * The probe guest: does this accelerator run 64-bit code? (DESIGN.md 2.3)
 *
 * These are the last 512 bytes of a 64 KiB ROM that QEMU is given as its firmware. From the reset vector it goes
 * through real and protected mode into long mode, computes something that needs 64-bit registers and a 64-bit stack,
 * and leaves through isa-debug-exit with the answer (QEMU's exit status is value * 2 + 1). On the way it writes
 * a letter to the debug console for each mode it has reached, so that a failure can be told by name.
 *
 * Source of the sequence: Intel SDM volume 3A, 9.8.5 "Initializing IA-32e Mode"; 9.1.4 for the reset vector.
 * probe.bin beside this file is what comes out of
 *     as --64 -o probe.o probe.S
 *     ld -m elf_x86_64 -Ttext=0xffe00 -e 0xffe00 -o probe.elf probe.o
 *     objcopy -O binary -j .text probe.elf probe.bin
 */
        .set    CONSOLE, 0xe9           /* isa-debugcon */
        .set    EXIT, 0xf4              /* isa-debug-exit */
        .set    RIGHT, 0x2a             /* exit status 85 */
        .set    WRONG, 0x15             /* exit status 43 */
        .set    TABLES, 0x1000          /* page tables, in RAM: PML4, PDPT, PD */
        .set    STACK, 0x8000

        .text
        .code16
real:   cli
        mov     $'R', %al
        out     %al, $CONSOLE
        lgdtl   %cs:(gdtr - 0xf0000)
        mov     %cr0, %eax
        or      $1, %al                 /* PE */
        mov     %eax, %cr0
        ljmpl   $0x08, $protected

        .code32
protected:
        mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $'P', %al
        out     %al, $CONSOLE

        xor     %eax, %eax              /* the first 2 MiB, identity-mapped by one large page */
        mov     $TABLES, %edi
        mov     $(3 * 4096 / 4), %ecx
        cld
        rep     stosl
        movl    $(TABLES + 0x1000 + 3), TABLES
        movl    $(TABLES + 0x2000 + 3), TABLES + 0x1000
        movl    $0x83, TABLES + 0x2000

        mov     %cr4, %eax
        or      $0x20, %eax             /* PAE */
        mov     %eax, %cr4
        mov     $TABLES, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx       /* EFER */
        rdmsr
        or      $0x100, %eax            /* LME */
        wrmsr
        mov     %cr0, %eax
        or      $0x80000000, %eax       /* PG */
        mov     %eax, %cr0
        ljmpl   $0x18, $long

        .code64
long:   mov     $'L', %al
        out     %al, $CONSOLE
        mov     $STACK, %rsp

        /*
         * 20 million rounds of x = x * a + c modulo 2^64, Knuth's MMIX generator, from x = 1. So many because some
         * hosts' KVM interprets 64-bit kernel code, at about 1 µs per instruction: it gets a short sequence right,
         * and never gets a guest booted. A CPU needs 0.1 s, TCG 0.2 s, such a KVM minutes.
         */
        mov     $1, %r8
        movabs  $6364136223846793005, %r9
        movabs  $1442695040888963407, %r10
        mov     $20000000, %r11d
1:      imul    %r9, %r8
        add     %r10, %r8
        push    %r8
        pop     %r8
        dec     %r11d
        jnz     1b

        movabs  $0x7abae2d0a1937501, %rax
        cmp     %rax, %r8
        mov     $RIGHT, %eax
        je      2f
        mov     $WRONG, %eax
2:      out     %eax, $EXIT
3:      hlt
        jmp     3b

        .balign 8, 0
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      /* 0x08: 32-bit code */
        .quad   0x00cf93000000ffff      /* 0x10: data */
        .quad   0x00af9b000000ffff      /* 0x18: 64-bit code */
gdtr:   .word   . - gdt - 1
        .long   gdt

        .org    0x1f0                   /* 0xfffffff0: where an x86 CPU starts */
        .code16
        jmp     real
        .org    0x200
