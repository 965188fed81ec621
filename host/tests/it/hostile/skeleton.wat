;; A handwritten plugin for misbehaviour that no compiler produces. It passes every record on. For records whose
;; payload begins with `b`, it calls `$fault` first. The test replaces the placeholders, which begin with `@`.
;;
;; Its memory: 0..4096 constants, 4096..65536 answers, above that what the host allocates.
(module
  ;;@imports
  (memory (export "memory") 64)
  (table $table 1 funcref)
  (global $free (mut i32) (i32.const 65536))
  ;; The host's last allocation with alignment 1: in `process`, the arena.
  (global $last (mut i32) (i32.const 0))
  (global $last_length (mut i32) (i32.const 0))
  (data (i32.const 0) "hostile")
  (data (i32.const 16) "1")
  (data (i32.const 32) "out")
  (data (i32.const 48) "application/octet-stream")
  ;; The route: name, format, columns.
  (data (i32.const 96) "\20\00\00\00\03\00\00\00\30\00\00\00\18\00\00\00\04\00\00\00\00\00\00\00")
  ;; The answer of `configure`: ok, name, version, accepts, routes, extra.
  (data (i32.const 128)
    "\00\00\00\00\00\00\00\00\07\00\00\00\10\00\00\00\01\00\00\00"
    "\04\00\00\00\00\00\00\00\60\00\00\00\01\00\00\00\04\00\00\00\00\00\00\00")

  (func (export "cabi_realloc") (param $old i32) (param $old_length i32)
                                (param $align i32) (param $length i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $free) (i32.const 7)) (i32.const -8)))
    (global.set $free (i32.add (local.get $at) (local.get $length)))
    (if (i32.eq (local.get $align) (i32.const 1))
      (then (global.set $last (local.get $at)) (global.set $last_length (local.get $length)))
      (else (if (call $culprit_arena) (then
        nop
        ;;@realloc
      ))))
    (local.get $at))

  ;; Whether a payload in the arena begins with `bad `.
  (func $culprit_arena (result i32)
    (local $at i32) (local $end i32)
    (local.set $at (global.get $last))
    (local.set $end (i32.sub (i32.add (local.get $at) (global.get $last_length)) (i32.const 4)))
    (loop $next
      (if (i32.gt_s (local.get $at) (local.get $end)) (then (return (i32.const 0))))
      (if (i32.eq (i32.load align=1 (local.get $at)) (i32.const 0x20646162))
        (then (return (i32.const 1))))
      (local.set $at (i32.add (local.get $at) (i32.const 1)))
      (br $next))
    unreachable)

  (func (export "shardmill:plugin/stage@0.1.0#configure")
    (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
    (local $turns i64)
    (global.set $last_length (i32.const 0))
    ;;@configure
    (i32.const 128))

  (func (export "shardmill:plugin/stage@0.1.0#process")
    (param $arena i32) (param $arena_length i32) (param $inputs i32) (param $words i32) (result i32)
    (local $index i32) (local $input i32) (local $output i32)
    ;; The answer at 4096: ok, arena, outputs, rejects. The words of the outputs are at 4352.
    (memory.fill (i32.const 4096) (i32.const 0) (i32.const 28))
    (i32.store (i32.const 4100) (i32.const 4352))
    (i32.store (i32.const 4108) (i32.const 4352))
    (i32.store (i32.const 4116) (i32.const 4352))
    (i32.store (i32.const 4112) (i32.mul (i32.div_u (local.get $words) (i32.const 10)) (i32.const 6)))
    (local.set $output (i32.const 4352))
    (local.set $input (local.get $inputs))
    (block $done
      (loop $next
        (br_if $done (i32.eq (i32.mul (local.get $index) (i32.const 10)) (local.get $words)))
        (if (i32.eq (i32.const 0x62) (i32.load8_u
              (i32.add (local.get $arena) (i32.load offset=8 (local.get $input)))))
          (then (call $fault)))
        (i32.store (local.get $output) (local.get $index))
        (i32.store offset=4 (local.get $output) (i32.const 0))
        (i32.store offset=8 (local.get $output) (i32.const -1))
        (i32.store offset=12 (local.get $output) (i32.const 0))
        (i32.store offset=16 (local.get $output) (i32.const -1))
        (i32.store offset=20 (local.get $output) (i32.const 0))
        (local.set $output (i32.add (local.get $output) (i32.const 24)))
        (local.set $input (i32.add (local.get $input) (i32.const 40)))
        (local.set $index (i32.add (local.get $index) (i32.const 1)))
        (br $next)))
    (global.set $last_length (i32.const 0))
    (global.get $answer))

  ;; Address that `process` returns for its answer.
  (global $answer (mut i32) (i32.const 4096))

  (func (export "cabi_post_shardmill:plugin/stage@0.1.0#process") (param i32)
    (global.set $free (i32.const 65536))
    (if (global.get $fault_done) (then
      nop
      ;;@post
    )))

  ;; Whether this instance has misbehaved.
  (global $fault_done (mut i32) (i32.const 0))

  (func $fault (local $turns i64)
    (global.set $fault_done (i32.const 1))
    ;;@process
  )
  ;;@items
)
