/* The witness guest: a freestanding x86-64 kernel that can tell what became of its memory.
 *
 * It is loaded as a plain ELF64 kernel by Firecracker (64-bit Linux boot protocol: long mode,
 * boot_params in rsi) and serves one-line commands on COM1; `python -m forkpointd.witness --help`
 * and witness/__init__.py list them. Three things about it are on purpose:
 *
 * - Idle costs no CPU: it waits in `sti; hlt` for the UART's interrupt (IRQ 4 by the 8259 PIC).
 *   Interrupts are enabled in that one place only, so the handler has one place to return to and
 *   jumps there by hand: some KVMs that emulate guest code have no iretq.
 * - It must be quick where every instruction is emulated (about a microsecond each): a stamped
 *   page costs two stores and an increment, the page tables are data and never change.
 * - It dirties nothing but what it was told to dirty and its own few variables: accessed and
 *   dirty bits are set beforehand in the page tables.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define PAGE 4096UL
#define PAGES_PER_MIB 256UL
#define REGION (64UL << 20)      /* guest-physical address of page 0 */
#define HIGH (4UL << 30)         /* where memory goes on after the gap for devices */
#define MAPPED (64UL << 30)      /* what the page tables below reach */
#define GROUP 16                 /* pages between two looks at the clock in `f` */
#define POLL_CYCLES (1UL << 22)  /* TSC cycles between two looks at the UART: 1 to 4 ms */

/* --- page tables: identity, 2 MiB pages, present, writable, accessed, dirty -------------------- */
__asm__(".section .tables,\"a\",@progbits\n"
        ".balign 4096\n"
        ".globl pml4\n"
        "pml4: .quad pdpt + 0x23\n"
        "  .fill 511, 8, 0\n"
        "pdpt:\n"
        "  .set offset, 0\n"
        "  .rept 64\n"
        "  .quad pd + offset + 0x23\n"
        "  .set offset, offset + 4096\n"
        "  .endr\n"
        "  .fill 448, 8, 0\n"
        "pd:\n"
        "  .set offset, 0\n"
        "  .rept 32768\n"
        "  .quad offset + 0xe3\n"
        "  .set offset, offset + 0x200000\n"
        "  .endr\n"
        ".text\n");
extern u64 pml4[];

/* --- entry, interrupt, exception --------------------------------------------------------------- */
__asm__(".text\n"
        ".globl _start\n"
        "_start: cli\n"
        "  mov $stack_top, %rsp\n"
        "  mov %rsi, %rdi\n"
        "  call kernel\n"
        ".globl interrupted\n" /* all registers are as they were at the hlt in wait_for_interrupt */
        "interrupted: mov resume_rsp, %rsp\n"
        "  jmp *resume_rip\n"
        ".globl faulted\n"
        "faulted: mov $stack_top, %rsp\n"
        "  call exception\n"
        ".bss\n"
        ".balign 4096\n"
        "  .skip 4096\n"
        "stack_top:\n"
        ".text\n");
void interrupted(void);
void faulted(void);

struct gate { u16 offset_low, selector; u8 ist, type; u16 offset_middle; u32 offset_high, zero; };
struct table { u16 limit; u64 base; } __attribute__((packed));
static struct gate idt[48] __attribute__((aligned(16)));
static u64 gdt[3] __attribute__((aligned(16))) = {
    0, 0x00af9b000000ffff /* 8: code, 64 bit */, 0x00cf93000000ffff /* 16: data */};
u64 resume_rsp, resume_rip;

static inline void outb(u16 port, u8 value) {
  __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}
static inline u8 inb(u16 port) {
  u8 value;
  __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}
static inline u64 rdtsc(void) {
  u32 low, high;
  __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
  return (u64)high << 32 | low;
}

/* An interrupt that came before the hlt is still latched in the PIC and ends it at once. */
static inline void wait_for_interrupt(void) {
  __asm__ volatile("mov %%rsp, resume_rsp\n"
                   "  movq $1f, resume_rip\n"
                   "  sti\n"
                   "  hlt\n"
                   "1: cli\n" ::: "memory");
}
static void halt(void) {
  for (;;) __asm__ volatile("cli; hlt");
}

static void start_interrupts(void) {
  struct table gdtr = {sizeof gdt - 1, (u64)gdt}, idtr = {sizeof idt - 1, (u64)idt};
  __asm__ volatile("lgdt %0\n"
                   "  mov %1, %%ds\n"
                   "  mov %1, %%es\n"
                   "  mov %1, %%ss\n"
                   "  pushq $8\n"
                   "  pushq $1f\n"
                   "  lretq\n"
                   "1:\n" ::"m"(gdtr), "r"(16) : "memory");
  for (int i = 0; i < 48; i++) {
    u64 handler = (u64)(i < 32 ? faulted : interrupted);
    idt[i] = (struct gate){(u16)handler, 8, 0, 0x8e, (u16)(handler >> 16), (u32)(handler >> 32), 0};
  }
  __asm__ volatile("lidt %0" ::"m"(idtr));
  /* Both PICs: initialise, vectors 32 and 40, cascade on line 2, 8086 mode with automatic end of
     interrupt (the handler has nothing to acknowledge); then unmask line 4 alone. */
  static const u8 setup[][2] = {{0x20, 0x11}, {0x21, 32}, {0x21, 4}, {0x21, 3}, {0x21, 0xef},
                                {0xa0, 0x11}, {0xa1, 40}, {0xa1, 2}, {0xa1, 3}, {0xa1, 0xff}};
  for (int i = 0; i < 10; i++) outb(setup[i][0], setup[i][1]);
  outb(0x3f9, 1); /* UART: interrupt when data has been received */
}

/* --- console ----------------------------------------------------------------------------------- */
static int input_waiting(void) { return inb(0x3fd) & 1; }
static u8 get(void) {
  while (!input_waiting()) wait_for_interrupt();
  return inb(0x3f8);
}
static void put(char c) { outb(0x3f8, (u8)c); }
static void puts(const char *s) {
  while (*s) put(*s++);
}
static void put_number(u64 v) {
  char digits[20];
  int n = 0;
  do digits[n++] = (char)('0' + v % 10);
  while (v /= 10);
  while (n) put(digits[--n]);
}
static void answer(char name, int count, u64 a, u64 b, u64 c, u64 d, u64 e) {
  u64 values[5] = {a, b, c, d, e};
  put(name);
  for (int i = 0; i < count; i++) {
    put(' ');
    put_number(values[i]);
  }
  put('\n');
}
void exception(void) {
  puts("! exception\n");
  halt();
}

/* Reads the rest of a line that must be `want` numbers with commas between them. Returns 0, or the
   first byte that does not fit. Numbers too large for any memory stay too large. */
static u8 numbers(int want, u64 *out) {
  int have = 0, digits = 0;
  u8 bad = 0;
  for (;;) {
    u8 c = get();
    if (c >= '0' && c <= '9' && have < want) {
      if (!digits++) out[have] = 0;
      if (out[have] < 1UL << 48) out[have] = out[have] * 10 + (c - '0');
    } else if (c == ',' && digits && have + 1 < want) {
      have++;
      digits = 0;
    } else if (c == '\n') {
      if (!bad && (want ? have + 1 != want || !digits : 0)) bad = c;
      return bad;
    } else if (!bad) {
      bad = c;
    }
  }
}

/* --- memory ------------------------------------------------------------------------------------ */
static u64 low_pages, all_pages; /* below the gap, and altogether */
static u64 generation, commands;

/* The usable memory by the e820 map in boot_params (Linux, Documentation/arch/x86/zero-page.rst). */
static void measure_memory(const u8 *boot_params) {
  u64 low_end = REGION, high_end = HIGH;
  const u8 *entry = boot_params + 0x2d0;
  for (int n = boot_params[0x1e8]; n > 0; n--, entry += 20) {
    u64 first = *(const u64 *)entry, end = first + *(const u64 *)(entry + 8);
    if (*(const u32 *)(entry + 16) != 1) continue;
    if (end > MAPPED) end = MAPPED;
    if (first <= REGION && end > low_end) low_end = end;
    if (first == HIGH && end > high_end) high_end = end;
  }
  low_pages = (low_end - REGION) / PAGE;
  all_pages = low_pages + (high_end - HIGH) / PAGE;
}
static int in_range(u64 first, u64 count) { return first <= all_pages && count <= all_pages - first; }
static u64 address(u64 page) {
  return page < low_pages ? REGION + page * PAGE : HIGH + (page - low_pages) * PAGE;
}
/* How many of these pages lie in one piece, that is before the gap. */
static u64 contiguous(u64 page, u64 count) {
  return page < low_pages && count > low_pages - page ? low_pages - page : count;
}

/* The clock as watched by `f` and `w`. It is read before their first answer and once more after the
   byte that ends them was seen: a pause lies between these two, most often in an I/O instruction. */
struct watch { u64 last, longest, polled; };
static inline struct watch start_watch(void) {
  u64 now = rdtsc();
  return (struct watch){now, 0, now};
}
static inline u64 tick(struct watch *w) {
  u64 now = rdtsc(), gap = now - w->last;
  w->last = now;
  if ((long)gap > (long)w->longest) w->longest = gap; /* a clock set back is no gap */
  return now;
}
static inline int ended_by_input(struct watch *w) {
  u64 now = tick(w);
  if (now - w->polled < POLL_CYCLES) return 0;
  w->polled = now;
  if (!input_waiting()) return 0;
  tick(w);
  return 1;
}

static inline void stamp_group(u64 at, u64 index) {
  __asm__ volatile(".set offset, 0\n"
                   "  .rept 16\n"
                   "  mov %2, offset(%1)\n"
                   "  mov %0, offset + 8(%1)\n"
                   "  inc %0\n"
                   "  .set offset, offset + 4096\n"
                   "  .endr\n" : "+r"(index) : "r"(at), "r"(generation) : "memory");
}
/* Stamps pages with the current generation. With a watch it looks at clock and input after every
   group and returns 1 as soon as a byte has come. */
static int stamp(u64 first, u64 count, struct watch *w) {
  while (count) {
    u64 at = address(first), piece = contiguous(first, count);
    count -= piece;
    for (; piece >= GROUP; piece -= GROUP, first += GROUP, at += GROUP * PAGE) {
      stamp_group(at, first);
      if (w && ended_by_input(w)) return 1;
    }
    for (; piece; piece--, first++, at += PAGE) {
      ((volatile u64 *)at)[0] = generation;
      ((volatile u64 *)at)[1] = first;
    }
  }
  return 0;
}
static void zero(u64 first, u64 count) {
  while (count) {
    u64 at = address(first), piece = contiguous(first, count), words = piece * (PAGE / 8);
    __asm__ volatile("rep stosq" : "+D"(at), "+c"(words) : "a"(0UL) : "memory");
    first += piece;
    count -= piece;
  }
}

/* Whether a whole group bears this generation and, unless that is 0, its own indices. */
static inline int group_is(u64 at, u64 gen, u64 index) {
  u64 different = 1;
  if (gen)
    __asm__ volatile(".set offset, 0\n"
                     "  .rept 16\n"
                     "  cmp %3, offset(%2)\n"
                     "  jne 1f\n"
                     "  cmp %1, offset + 8(%2)\n"
                     "  jne 1f\n"
                     "  inc %1\n"
                     "  .set offset, offset + 4096\n"
                     "  .endr\n"
                     "  dec %0\n"
                     "1:\n" : "+r"(different), "+r"(index) : "r"(at), "r"(gen) : "memory", "cc");
  else
    __asm__ volatile(".set offset, 0\n"
                     "  .rept 16\n"
                     "  cmp %2, offset(%1)\n"
                     "  jne 1f\n"
                     "  .set offset, offset + 4096\n"
                     "  .endr\n"
                     "  dec %0\n"
                     "1:\n" : "+r"(different) : "r"(at), "r"(gen) : "memory", "cc");
  return !different;
}
static void verify(u64 mib) {
  u64 lowest = ~0UL, highest = 0, changes = 0, misplaced = 0;
  u64 before = mib ? *(volatile u64 *)address(0) : 0;
  for (u64 page = 0, count = mib * PAGES_PER_MIB; page < count;) {
    u64 at = address(page);
    if (lowest <= before && contiguous(page, count - page) >= GROUP && group_is(at, before, page)) {
      page += GROUP;
      continue;
    }
    const volatile u64 *words = (const volatile u64 *)at;
    u64 gen = words[0];
    misplaced += gen && words[1] != page;
    changes += gen != before;
    if (gen < lowest) lowest = gen;
    if (gen > highest) highest = gen;
    before = gen;
    page++;
  }
  answer('V', 5, mib, mib ? lowest : 0, highest, changes, misplaced);
}

/* --- commands ---------------------------------------------------------------------------------- */
static void free_run(u64 mib) {
  struct watch w = start_watch();
  answer('F', 1, mib, 0, 0, 0, 0);
  do generation++;
  while (!stamp(0, mib * PAGES_PER_MIB, &w));
  get();
  answer('S', 2, generation, w.longest, 0, 0, 0);
}
static void watch_clock(void) {
  struct watch w = start_watch();
  puts("W\n");
  while (!ended_by_input(&w))
    ;
  get();
  answer('G', 2, w.longest, rdtsc(), 0, 0, 0);
}

static void serve(void) {
  u64 n[2] = {0, 0};
  u8 command = get(), bad = command;
  if (command != '\n') {
    int want = 0;
    for (const char *c = "d1v1f1r1p2z2t0w0c0h0"; *c; c += 2)
      if (command == (u8)*c) want = c[1] - '0' + 1;
    u8 rest = numbers(want ? want - 1 : 0, n);
    bad = want ? rest : command;
  }
  if (bad) {
    answer('?', 1, bad, 0, 0, 0, 0);
    return;
  }
  int by_mib = command == 'd' || command == 'v' || command == 'f';
  u64 first = by_mib ? 0 : n[0], count = by_mib ? n[0] * PAGES_PER_MIB : command == 'r' ? 1 : n[1];
  if (!in_range(first, count) || (command == 'f' && !count)) {
    puts("? range\n");
    return;
  }
  commands++;
  switch (command) {
    case 't': answer('T', 2, generation, commands, 0, 0, 0); break;
    case 'd':
      generation++;
      stamp(0, count, 0);
      answer('D', 2, n[0], generation, 0, 0, 0);
      break;
    case 'p':
      generation++;
      stamp(first, count, 0);
      answer('P', 3, first, count, generation, 0, 0);
      break;
    case 'z':
      zero(first, count);
      answer('Z', 3, first, count, generation, 0, 0);
      break;
    case 'v': verify(n[0]); break;
    case 'r': answer('R', 2, first, *(volatile u64 *)address(first), 0, 0, 0); break;
    case 'f': free_run(n[0]); break;
    case 'w': watch_clock(); break;
    case 'c': answer('C', 1, rdtsc(), 0, 0, 0, 0); break;
    case 'h': puts("H\n"); halt();
  }
}

void kernel(const u8 *boot_params) {
  measure_memory(boot_params);
  __asm__ volatile("mov %0, %%cr3" ::"r"(pml4) : "memory");
  start_interrupts();
  puts("READY\n");
  for (;;) serve();
}
