;; A handwritten plugin that calls the host. It passes every record on by its only route, unless code that the test
;; puts in place of a placeholder (they begin with `@`) returns something else.
;;
;; Its memory: 0..1024 constants, 1024..4096 bytes of the test, 4096..8192 its answers, 8192 answers of the host,
;; 16384..131072 the words of the outputs, above that what the host allocates.
(module
  ;;@imports
  (memory (export "memory") 4)
  (global $free (mut i32) (i32.const 131072))
  (data (i32.const 16) "1")
  ;;@constants
  ;;@data

  (func $room (export "cabi_realloc") (param $old i32) (param $old_length i32)
                                (param $align i32) (param $length i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $free) (i32.const 7)) (i32.const -8)))
    (global.set $free (i32.add (local.get $at) (local.get $length)))
    (loop $grow
      (if (i32.gt_u (global.get $free) (i32.mul (memory.size) (i32.const 65536))) (then
        (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then unreachable))
        (br $grow))))
    (local.get $at))

  ;; Returns the answer of `configure` that refuses the configuration with this text.
  (func $refusal (param $words i32) (param $length i32) (result i32)
    (i32.store (i32.const 4096) (i32.const 1))
    (i32.store (i32.const 4100) (local.get $words))
    (i32.store (i32.const 4104) (local.get $length))
    (i32.const 4096))

  ;; Returns the answer of `process` that fails for good with this text.
  (func $failure (param $words i32) (param $length i32) (result i32)
    (memory.fill (i32.const 4096) (i32.const 0) (i32.const 28))
    (i32.store (i32.const 4096) (i32.const 1))
    (i32.store (i32.const 4112) (local.get $words))
    (i32.store (i32.const 4116) (local.get $length))
    (i32.const 4096))

  (func (export "shardmill:plugin/stage@0.1.0#configure")
    (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
    (local $i i32)
    ;;@configure
    (i32.const 128))

  (func (export "shardmill:plugin/stage@0.1.0#process")
    (param $arena i32) (param $arena_length i32) (param $inputs i32) (param $words i32) (result i32)
    (local $index i32) (local $output i32) (local $i i32)
    ;;@process
    ;; The answer at 4096: ok, arena, outputs, rejects.
    (memory.fill (i32.const 4096) (i32.const 0) (i32.const 28))
    (i32.store (i32.const 4100) (i32.const 16384))
    (i32.store (i32.const 4108) (i32.const 16384))
    (i32.store (i32.const 4116) (i32.const 16384))
    (i32.store (i32.const 4112) (i32.mul (i32.div_u (local.get $words) (i32.const 10)) (i32.const 6)))
    (local.set $output (i32.const 16384))
    (block $done
      (loop $next
        (br_if $done (i32.eq (i32.mul (local.get $index) (i32.const 10)) (local.get $words)))
        (i32.store (local.get $output) (local.get $index))
        (i32.store offset=4 (local.get $output) (i32.const 0))
        (i32.store offset=8 (local.get $output) (i32.const -1))
        (i32.store offset=12 (local.get $output) (i32.const 0))
        (i32.store offset=16 (local.get $output) (i32.const -1))
        (i32.store offset=20 (local.get $output) (i32.const 0))
        (local.set $output (i32.add (local.get $output) (i32.const 24)))
        (local.set $index (i32.add (local.get $index) (i32.const 1)))
        (br $next)))
    (i32.const 4096))

  (func (export "cabi_post_shardmill:plugin/stage@0.1.0#process") (param i32)
    (global.set $free (i32.const 131072)))
)
